"""The tinker SDK's operations, one class each; ``tinkerapi.api.sdk.urls`` has their routes."""
