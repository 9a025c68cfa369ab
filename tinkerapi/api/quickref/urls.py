"""The quick reference's route table: one line per endpoint, in the order of the manual."""

from django.urls import URLPattern, path

from tinkerapi.api.quickref.views import (
    description,
    futures,
    imports,
    metrics,
    monitoring,
    runs,
    sampling,
    service,
    steps,
    weights,
)

urlpatterns: list[URLPattern] = [
    # The server
    path("", service.IndexView.as_view(), name="index"),
    path("healthz", service.HealthView.as_view()),
    path("readyz", service.ReadyView.as_view()),
    path("metrics", monitoring.PrometheusView.as_view()),
    path("get_server_capabilities", service.CapabilitiesView.as_view()),
    path("list_loss_functions", service.LossFunctionListView.as_view()),
    # Training
    path("api/v1/forward", steps.ForwardView.as_view()),
    path("api/v1/forward_async", steps.ForwardView.as_view(waits=False)),
    path("fwd", steps.ForwardView.as_view(waits=False, legacy=True)),
    path("api/v1/forward_backward", steps.ForwardBackwardView.as_view()),
    path("api/v1/forward_backward_async", steps.ForwardBackwardView.as_view(waits=False)),
    path("fwdbwd", steps.ForwardBackwardView.as_view(waits=False, legacy=True)),
    path("api/v1/optim_step", steps.OptimStepView.as_view()),
    path("api/v1/optim_step_async", steps.OptimStepView.as_view(waits=False)),
    path("optim_step", steps.OptimStepView.as_view(waits=False, legacy=True)),
    # Models
    path("api/v1/add_lora", runs.AddLoraView.as_view()),
    path("api/v1/add_lora_async", runs.AddLoraView.as_view(waits=False)),
    path("add_lora", runs.AddLoraView.as_view(waits=False, legacy=True)),
    path("api/v1/remove_lora", runs.RemoveLoraView.as_view()),
    path("api/v1/remove_lora_async", runs.RemoveLoraView.as_view(waits=False)),
    path("remove_lora", runs.RemoveLoraView.as_view(waits=False, legacy=True)),
    path("get_info", runs.GetInfoView.as_view()),
    path("api/v1/adapters", runs.AdapterListView.as_view()),
    path("api/v1/adapters/<str:model_id>", runs.AdapterView.as_view()),
    path("api/v1/runs/<str:run_id>/metrics", metrics.MetricsView.as_view()),
    # Sampling
    path("api/v1/sample", sampling.SampleView.as_view()),
    path("api/v1/asample", sampling.SampleView.as_view(waits=False)),
    # Weights
    path("api/v1/save_weights", weights.SaveWeightsView.as_view()),
    path("api/v1/save_weights_async", weights.SaveWeightsView.as_view(waits=False)),
    path("save_weights", weights.SaveWeightsView.as_view(waits=False, legacy=True)),
    path("api/v1/save_weights_for_sampler", weights.SaveWeightsForSamplerView.as_view()),
    path(
        "api/v1/save_weights_for_sampler_async",
        weights.SaveWeightsForSamplerView.as_view(waits=False),
    ),
    path(
        "save_weights_for_sampler",
        weights.SaveWeightsForSamplerView.as_view(waits=False, legacy=True),
    ),
    path("api/v1/save_weights_external", weights.SaveWeightsExternalView.as_view()),
    path(
        "api/v1/save_weights_external_async",
        weights.SaveWeightsExternalView.as_view(waits=False),
    ),
    path("api/v1/load_weights", weights.LoadWeightsView.as_view()),
    path("api/v1/load_weights_async", weights.LoadWeightsView.as_view(waits=False)),
    path("load_weights", weights.LoadWeightsView.as_view(waits=False, legacy=True)),
    path("api/v1/import_adapter", imports.ImportAdapterView.as_view()),
    path("api/v1/import_adapter_async", imports.ImportAdapterView.as_view(waits=False)),
    # Futures
    path("retrieve_future", futures.RetrieveFutureView.as_view()),
    path("cancel_future", futures.CancelFutureView.as_view()),
    # Documentation
    path("api/schema", description.SchemaView.as_view(), name="schema"),
    path("api/docs", description.TryView.as_view(url_name="schema"), name="api-docs"),
]
