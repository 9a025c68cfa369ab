"""The tinker SDK's operations, one class each; ``tinkerapi.api.sdk.urls`` says where."""
