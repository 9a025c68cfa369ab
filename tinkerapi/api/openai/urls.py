"""The OpenAI-compatible routes, below ``/v1/``: a client's ``base_url`` ends there."""

from django.urls import URLPattern, path

from tinkerapi.api.openai import views

urlpatterns: list[URLPattern] = [
    path("models", views.ModelListView.as_view()),
    path("models/<path:model>", views.ModelView.as_view()),
    path("completions", views.CompletionView.as_view()),
    path("chat/completions", views.ChatCompletionView.as_view()),
]
