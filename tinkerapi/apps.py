"""The Django project as an app: keys, commands, the HTTP face."""

from django.apps import AppConfig


class TinkerapiConfig(AppConfig):
    name = "tinkerapi"
    verbose_name = "Access"
