"""The tinker SDK's route table, below ``/api/v1/``.

No route ends in a slash, and nothing redirects: a client would send its POST as a GET.
"""

from django.urls import URLPattern, path

from tinkerapi.api.sdk.views import (
    admin,
    auth,
    custom_losses,
    downloads,
    futures,
    models,
    rest,
    sampling,
    service,
    sessions,
    steps,
    weights,
)

CHECKPOINT = "training_runs/<str:run>/checkpoints/<path:checkpoint_id>"
"""A checkpoint's id contains a slash, so longer routes must precede the bare one."""

urlpatterns: list[URLPattern] = [
    # Service
    path("client/config", service.ClientConfigView.as_view()),
    path("client/dynamic_config", service.DynamicConfigView.as_view()),
    path("auth/token", auth.TokenView.as_view()),
    path("auth/apikey/me", auth.OwnKeyView.as_view()),
    path("telemetry", service.TelemetryView.as_view()),
    path("create_session", service.CreateSessionView.as_view()),
    path("session_heartbeat", service.SessionHeartbeatView.as_view()),
    path("sessions/<str:session_id>/finish", service.SessionFinishView.as_view()),
    # Models
    path("create_model", models.CreateModelView.as_view()),
    path("get_info", models.GetInfoView.as_view()),
    path("unload_model", models.UnloadModelView.as_view()),
    path("create_custom_loss", custom_losses.CreateCustomLossView.as_view()),
    # Training
    path("forward", steps.ForwardView.as_view()),
    path("forward_backward", steps.ForwardBackwardView.as_view()),
    path("optim_step", steps.OptimStepView.as_view()),
    # Futures
    path("retrieve_future", futures.RetrieveFutureView.as_view()),
    path("retrieve_futures", sampling.RetrieveFuturesView.as_view()),
    path("cancel_future", futures.CancelFutureView.as_view()),
    # Sampling
    path("asample", sampling.SampleView.as_view()),
    path("create_sampling_session", sampling.CreateSamplingSessionView.as_view()),
    path("samplers/<str:sampling_session_id>", sampling.SamplerView.as_view()),
    path("join_sampling_session", sampling.JoinSamplingSessionView.as_view()),
    # Weights
    path("save_weights", weights.SaveWeightsView.as_view()),
    path("save_weights_for_sampler", weights.SaveWeightsForSamplerView.as_view()),
    path("save_weights_external", weights.SaveWeightsExternalView.as_view()),
    path("load_weights", weights.LoadWeightsView.as_view()),
    path("weights_info", weights.WeightsInfoView.as_view()),
    path("copy_weights", weights.CopyWeightsView.as_view()),
    # Listings and checkpoints
    path("training_runs", rest.TrainingRunListView.as_view()),
    path("training_runs/<str:run>", rest.TrainingRunView.as_view()),
    path("training_runs/<str:run>/checkpoints", rest.RunCheckpointListView.as_view()),
    path(f"{CHECKPOINT}/publish", rest.CheckpointPublishView.as_view()),
    path(f"{CHECKPOINT}/ttl", rest.CheckpointTtlView.as_view()),
    path(f"{CHECKPOINT}/external_weights_urls", downloads.ExternalWeightsUrlsView.as_view()),
    path(f"{CHECKPOINT}/archive", downloads.ArchiveView.as_view()),
    path(CHECKPOINT, rest.CheckpointView.as_view()),
    path("checkpoints", rest.CheckpointListView.as_view()),
    path(
        "downloads/<str:token>/<str:file_name>",
        downloads.DownloadView.as_view(),
        name="sdk-download",
    ),
    path("sessions", sessions.SessionListView.as_view()),
    path("sessions/search", sessions.SessionSearchView.as_view()),
    path("sessions/<str:session_id>", sessions.SessionView.as_view()),
    path("sessions/<str:session_id>/project", sessions.SessionProjectView.as_view()),
    path("sessions/<str:session_id>/trace_export", sessions.SessionTraceView.as_view()),
    path("audit", admin.AuditView.as_view()),
    path("billing/usage/events", admin.UsageView.as_view()),
    path("billing/usage/checkpoints/current", admin.StorageUsageView.as_view()),
]
