"""All settings, from top to bottom: folders, Django, the queue, our own.

Every variable of ours begins with ``TINKERAPI_``; the README's configuration table lists
them, and a test keeps the two equal. An invalid value stops the start with a
message instead of being replaced by a default.
"""

import os
from pathlib import Path

from tinkerapi.config.base_models import (
    MOST_BYTES,
    base_models_from_file,
    base_models_from_names,
)
from tinkerapi.config.environment import (
    env_bool,
    env_bucket,
    env_choice,
    env_database,
    env_hosts,
    env_int,
    env_int_or_auto,
    env_names,
    env_origins,
    env_text,
    env_url,
    kept_secret,
    refuse_beside,
    refuse_unknown_variables,
)
from tinkerapi.config.webhook import env_webhook
from training.base_model_config import DTYPES, LAYOUTS, MOST_WORKERS

BASE_DIR = Path(__file__).resolve().parent.parent
IS_CHECKOUT = (BASE_DIR / "manage.py").exists()
"""False: an installed package, whose folder belongs to pip."""

# --- Folders ----------------------------------------------------------------------------

_USER_DATA = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
DATA_DIR = Path(
    env_text("TINKERAPI_DATA_DIR")
    or (BASE_DIR / "var" if IS_CHECKOUT else _USER_DATA / "tinkerapi")
).resolve()
"""Embedded database, converted models, snapshots and checkpoints; back this up."""

STORAGE = env_bucket("TINKERAPI_STORAGE")
"""The bucket of checkpoints and snapshots; empty: they are in the data folder."""

STORAGE_CACHE_BYTES = env_int(
    "TINKERAPI_STORAGE_CACHE_BYTES", 20 * 2**30, minimum=0, maximum=MOST_BYTES
)
"""How much of a bucket is kept in the data folder of each machine that reads it."""

# Every process of ours runs this, so none leaves a file that other users of the machine can read:
# neither in the data folder nor in the output of a command, such as a backup.
os.umask(0o077)
FILE_UPLOAD_PERMISSIONS = (
    0o600  # of the admin's static files; Django's default would make them readable
)

ROLE = env_choice("TINKERAPI_ROLE", "cli", ("cli", "web", "worker"))
"""Which process this is; set by ``up``, never by hand. Decides how connections are kept."""

WATCHDOG_FD = env_int("TINKERAPI_WATCHDOG_FD", -1, minimum=-1)
"""The pipe in which a worker reports progress to its supervisor; set by ``up``, never by hand."""

# --- Django -----------------------------------------------------------------------------

DEBUG = env_bool("TINKERAPI_DEBUG", False)
SECRET_KEY = env_text("TINKERAPI_SECRET_KEY") or kept_secret(DATA_DIR / "secret_key")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")

PUBLIC_URL = env_url("TINKERAPI_PUBLIC_URL")
"""The server's address behind a proxy; links begin with it. Empty: no proxy."""

TLS = env_bool("TINKERAPI_TLS", PUBLIC_URL.startswith("https://"))
"""Clients reach the server through a proxy that speaks TLS: links say https, cookies are only
sent over TLS, and browsers are told to use TLS only."""

# Loopback names are always allowed: health checks use them, and no other site can have them.
ALLOWED_HOSTS = [*env_hosts("TINKERAPI_ALLOWED_HOSTS", "*"), *LOOPBACK_NAMES]
CSRF_TRUSTED_ORIGINS = env_origins("TINKERAPI_CSRF_TRUSTED_ORIGINS")
if PUBLIC_URL:
    CSRF_TRUSTED_ORIGINS.append(PUBLIC_URL)
HAS_PUBLIC_NAME = bool(TLS or CSRF_TRUSTED_ORIGINS or set(ALLOWED_HOSTS) - {"*", *LOOPBACK_NAMES})
"""Whether the settings say that the server is reached from elsewhere."""

INSTALLED_APPS = [
    "unfold",  # before django.contrib.admin, whose templates it replaces
    "unfold.contrib.filters",
    # Without its pages, which only processes that serve some import (``tinkerapi.urls``).
    "django.contrib.admin.apps.SimpleAdminConfig",
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django.contrib.messages",
    "django.contrib.staticfiles",
    "django.contrib.humanize",
    "rest_framework",
    "drf_spectacular",
    "drf_spectacular_sidecar",
    "django_q",
    "futures",
    "training",
    "tinkerapi",
]

# Async-capable ones only: a sync middleware would cost every waiting request a thread switch.
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "tinkerapi.console.content_policy.content_policy_middleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.messages.middleware.MessageMiddleware",
    "django.middleware.clickjacking.XFrameOptionsMiddleware",
    "tinkerapi.console.page_errors.ImpossiblePageMiddleware",
]
APPEND_SLASH = False  # a redirect would turn a client's POST into a GET

ROOT_URLCONF = "tinkerapi.urls"
ASGI_APPLICATION = "tinkerapi.asgi.application"
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "DIRS": [BASE_DIR / "tinkerapi" / "templates"],  # in a checkout a link, for wheels
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.contrib.auth.context_processors.auth",
                "django.contrib.messages.context_processors.messages",
            ]
        },
    }
]
AUTH_PASSWORD_VALIDATORS = [
    {"NAME": f"django.contrib.auth.password_validation.{name}"}
    for name in (
        "UserAttributeSimilarityValidator",
        "MinimumLengthValidator",
        "CommonPasswordValidator",
        "NumericPasswordValidator",
    )
]
LANGUAGE_CODE = "en"
USE_TZ = True
TIME_ZONE = "UTC"
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "/static/"
STATIC_ROOT = DATA_DIR / "static"
X_FRAME_OPTIONS = "DENY"
SECURE_CONTENT_TYPE_NOSNIFF = True
SECURE_REFERRER_POLICY = "same-origin"
SESSION_COOKIE_SECURE = CSRF_COOKIE_SECURE = TLS
SECURE_HSTS_SECONDS = 365 * 24 * 3600 if TLS else 0

# --- Postgres ---------------------------------------------------------------------------

# Without DATABASE_URL the embedded Postgres is used: a socket in the data folder.
DATABASE_URL = os.environ.get("DATABASE_URL", "").strip()
if DATABASE_URL:
    database = env_database("DATABASE_URL")
else:
    from tinkerapi.server.postgres import embedded_database

    database = embedded_database(DATA_DIR)

# Pages get a connection for each request; the threads that serve the API keep theirs, whatever
# this says. The worker keeps one connection: django-q2 closes old connections around
# each call, and with 0 it would reconnect each time.
DATABASES = {
    "default": {
        **database,
        "CONN_MAX_AGE": 0 if ROLE == "web" else None,
        "CONN_HEALTH_CHECKS": True,
        "OPTIONS": {
            # The ORM never prepares statements; the queue's own take longer to plan than to run.
            "prepare_threshold": 2,
            "connect_timeout": 4,  # seconds; without it an unreachable host takes two minutes
            # Postgres overestimates the claim's cost, and would take longer to compile
            # it than to run it.
            "options": "-c jit=off",
            **database.get("OPTIONS", {}),
        },
    }
}

# --- django-q2 --------------------------------------------------------------------------

FUTURES_QUEUE_IS_SERVED = "training.base_models.queue_is_served"
"""Names the function that says whether a worker of this server serves an engine queue."""

Q_CLUSTER = {
    "name": "tinkerapi",  # also the salt that signs tasks, so equal in every process
    "orm": "default",
    "broker_class": "futures.broker.PostgresBroker",  # LISTEN instead of polling
    "workers": 1,
    "queue_limit": 1,  # no prefetch: a prefetched task is invisible until `retry`
    "bulk": 1,  # more would reorder
    "poll": 2,  # seconds of delay after a lost NOTIFY
    "timeout": 1800,
    "retry": 2000,  # must exceed timeout; recovery does not rely on it
    "recycle": 0,  # never: a new worker process would load the model again
    "ack_failures": True,  # failures live on the Future
    "max_attempts": 3,
    "save_limit": -1,  # successes are not kept: each save would lock all kept rows
    "catch_up": False,
    "log_level": "WARNING",  # a line for each doorbell would cost a quarter of a submission
    "ALT_CLUSTERS": {},  # must exist, or naming another cluster is a KeyError at import
}

FUTURES_TASK = "training.tasks.work"
"""The function that a doorbell task calls with the queue's name: look at the futures."""

FUTURES_RESULT_VALUE = "training.kinds.result_value"
"""Names the function that makes a kind's stored result comparable, for ``replayfuture``."""

FUTURES_PRUNABLE = "training.selectors.futures_prunable"
"""Names the function that excludes payloads that a recovery may need from ``prunefutures``."""

# --- HTTP -------------------------------------------------------------------------------

REST_FRAMEWORK = {
    "DEFAULT_AUTHENTICATION_CLASSES": ["tinkerapi.api.authentication.ApiKeyAuthentication"],
    "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
    "DEFAULT_PARSER_CLASSES": ["tinkerapi.api.bodies.parsers.JSONParser"],
    "DEFAULT_RENDERER_CLASSES": ["tinkerapi.api.renderers.JSONRenderer"],
    "DEFAULT_SCHEMA_CLASS": "drf_spectacular.openapi.AutoSchema",
    "EXCEPTION_HANDLER": "tinkerapi.api.errors.exception_handler",
    "UNAUTHENTICATED_USER": None,
}
SPECTACULAR_SETTINGS = {
    "TITLE": "tinkerapi",
    "DESCRIPTION": "A self-hosted training API for LoRA fine-tuning.",
    "VERSION": "0.1.0",
    "SERVE_INCLUDE_SCHEMA": False,
    "SWAGGER_UI_DIST": "SIDECAR",
    "SWAGGER_UI_FAVICON_HREF": "SIDECAR",
    "REDOC_DIST": "SIDECAR",
}

# --- Ours: the model --------------------------------------------------------------------

ADAPTER_CACHE_BYTES = env_int("TINKERAPI_ADAPTER_CACHE_BYTES", 0, minimum=0, maximum=MOST_BYTES)
"""Memory limit of the adapters in one worker; the others are on disk until they are used. 0: a
share of the free memory of the device or the machine after the base model is loaded."""

ACTIVATION_BYTES = env_int("TINKERAPI_ACTIVATION_BYTES", 0, minimum=0, maximum=MOST_BYTES)
"""A training pass whose activations take more computes them again in its backward pass. 0: a fourth
of the memory that is free when it begins."""

_DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
_DEVICE = env_choice("TINKERAPI_DEVICE", "auto", ("auto", "cpu", "cuda"))
_DTYPE = env_choice("TINKERAPI_DTYPE", "auto", DTYPES)
_LAYOUT = env_choice("TINKERAPI_LAYOUT", "auto", LAYOUTS)
WORKERS = env_int("TINKERAPI_WORKERS", 1, maximum=MOST_WORKERS)
"""Worker processes of each base model that no configuration file names."""
_CONFIG = env_text("TINKERAPI_CONFIG")
_NAMES = env_names("TINKERAPI_BASE_MODEL", _DEFAULT_MODEL)

BASE_MODELS = (
    base_models_from_file(Path(_CONFIG).expanduser().resolve())
    if _CONFIG
    else base_models_from_names(
        _NAMES,
        device=_DEVICE,
        dtype=_DTYPE,
        layout=_LAYOUT,
        cache_bytes=ADAPTER_CACHE_BYTES,
        workers=WORKERS,
        activation_bytes=ACTIVATION_BYTES,
    )
)
"""The served base models, the default first, and their workers. A configuration file replaces all
of these settings."""
refuse_beside(
    "TINKERAPI_CONFIG",
    "TINKERAPI_BASE_MODEL",
    "TINKERAPI_DEVICE",
    "TINKERAPI_DTYPE",
    "TINKERAPI_LAYOUT",
    "TINKERAPI_WORKERS",
    "TINKERAPI_ADAPTER_CACHE_BYTES",
    "TINKERAPI_ACTIVATION_BYTES",
)

NUM_THREADS = env_int_or_auto("TINKERAPI_NUM_THREADS", maximum=1024)
"""Threads of one worker on a CPU; 0: as many as other processes leave idle cores."""

BATCH_TOKENS = env_int("TINKERAPI_BATCH_TOKENS", 4096)
"""Tokens in one pass over the base model; more is faster until memory runs out."""

CACHE_TOKENS = env_int("TINKERAPI_CACHE_TOKENS", 0, minimum=0)
"""Tokens whose keys and values are held for sampling; more sequences take turns. 0: as many as fit
into a quarter of the memory that is free at the start, and at least 32,768."""

SNAPSHOT_SECONDS = env_int("TINKERAPI_SNAPSHOT_SECONDS", 30, minimum=0)
"""Work of a run, in seconds, that may be repeated after a crash; never less than
ten times the time of writing a snapshot."""

HANG_SECONDS = env_int("TINKERAPI_HANG_SECONDS", 300)
"""A worker that makes no progress for this long is killed and replaced. One layer of one pass, one
snapshot or one statement must fit in; a pass or a request as a whole need not."""

# --- Ours: processes --------------------------------------------------------------------

WEB_PROCESSES = env_int("TINKERAPI_WEB_PROCESSES", 1, maximum=256)
"""Processes that answer HTTP. One takes some hundreds of submissions a second and holds
thousands of waits; a second helps if cores are idle."""

# --- Ours: events -----------------------------------------------------------------------

WEBHOOK = env_webhook(
    "TINKERAPI_WEBHOOK_URL", "TINKERAPI_WEBHOOK_SECRET", "TINKERAPI_WEBHOOK_EVENTS"
)
"""Where ``up`` sends events, signed with the secret, and which; None: nowhere."""

# --- Ours: access and limits ------------------------------------------------------------

REQUIRE_API_KEY = env_bool("TINKERAPI_REQUIRE_API_KEY", False) or HAS_PUBLIC_NAME
"""``up`` turns it on whenever it binds to an address that is not loopback."""

MAX_BODY_BYTES = env_int("TINKERAPI_MAX_BODY_BYTES", 32 * 1024 * 1024, maximum=2**40)
MAX_IMPORT_BYTES = env_int("TINKERAPI_MAX_IMPORT_BYTES", 2**30, maximum=2**40)
"""The largest upload of an adapter, packed and unpacked."""
BODY_IDLE_SECONDS = env_int("TINKERAPI_BODY_IDLE_SECONDS", 20)
"""How long a request's body may pause while it arrives."""
BODY_SECONDS = env_int("TINKERAPI_BODY_SECONDS", 300)
"""How long the whole body may take."""
MAX_DATUMS = env_int("TINKERAPI_MAX_DATUMS", 1024)
TEXT_SECONDS = env_int("TINKERAPI_TEXT_SECONDS", 20)
MAX_DATUM_TOKENS = env_int("TINKERAPI_MAX_DATUM_TOKENS", 32768)
MAX_IMAGE_BYTES = env_int("TINKERAPI_MAX_IMAGE_BYTES", 16 * 1024 * 1024, maximum=2**31)
MAX_IMAGE_PIXELS = env_int("TINKERAPI_MAX_IMAGE_PIXELS", 4096 * 4096, maximum=2**28)
"""Width times height; decoded, a pixel takes some 30 bytes for a moment."""
MAX_IMAGES = env_int("TINKERAPI_MAX_IMAGES", 1024)
"""Images in one request."""
MAX_REQUEST_PIXELS = env_int("TINKERAPI_MAX_REQUEST_PIXELS", 16 * 4096 * 4096, maximum=2**40)
"""Pixels of all images of one request: the worker takes about a second for 50 million."""
MAX_SAMPLES = env_int("TINKERAPI_MAX_SAMPLES", 256)
DEFAULT_MAX_TOKENS = env_int("TINKERAPI_DEFAULT_MAX_TOKENS", 512)
"""Length of a sample if the request does not set one."""
MAX_LORA_RANK = env_int("TINKERAPI_MAX_LORA_RANK", 256)
MAX_ADAPTERS = env_int("TINKERAPI_MAX_ADAPTERS", 100)
"""Live adapters of one user."""
MAX_PENDING = env_int("TINKERAPI_MAX_PENDING", 20000)
"""Waiting futures of one user."""

USER_STORAGE_BYTES = env_int("TINKERAPI_USER_STORAGE_BYTES", 0, minimum=0, maximum=2**60)
"""Most storage of one user's checkpoints, snapshots, requests and results; 0: no limit."""

USER_TOKENS_PER_DAY = env_int("TINKERAPI_USER_TOKENS_PER_DAY", 0, minimum=0, maximum=2**60)
"""Most tokens that one user may train on, have read as prompts and sample in a day of UTC; 0: no
limit."""
CHECKPOINT_TTL_DAYS = env_int("TINKERAPI_CHECKPOINT_TTL_DAYS", 0, minimum=0, maximum=3650)
"""When a checkpoint is deleted whose save names no time to live; 0: never."""
KEEP_CHECKPOINTS = env_int("TINKERAPI_KEEP_CHECKPOINTS", 0, minimum=0, maximum=1_000_000)
"""How many checkpoints of each kind a run keeps, the newest; 0: all."""

SYNC_TIMEOUT_SECONDS = env_int("TINKERAPI_SYNC_TIMEOUT_SECONDS", 300)
"""How long a sync call waits before it answers 202 with the future's id."""
MAX_WAIT_SECONDS = env_int("TINKERAPI_MAX_WAIT_SECONDS", 60)
"""Largest ``wait`` of /retrieve_future."""

STABLE_REINFORCE = env_choice("TINKERAPI_STABLE_REINFORCE", "ours", ("ours", "refuse"))
"""The hosted service's objective of this name is not public: serve our own (``losses.md``), or
refuse the loss and the recording of samples for it."""

GAP_SECONDS = env_int("TINKERAPI_GAP_SECONDS", 600)
"""How long a numbered request waits for a lower number that has not arrived, before it fails.
The tinker SDK tries to deliver a request for about five minutes."""

SDK_JWT = env_bool("TINKERAPI_SDK_JWT", False)
"""Let tinker SDK clients exchange their key for a token of one hour; ``tinker auth whoami``
needs it."""

WORKER_HOUR_CENTS = env_int("TINKERAPI_WORKER_HOUR_CENTS", 0, minimum=0)
"""Price of an hour of one worker (its GPU) in US cents; 0: usage has no price."""

KEEP_RESULTS_DAYS = env_int("TINKERAPI_KEEP_RESULTS_DAYS", 30, maximum=36500)
"""How long ``prunefutures`` keeps payloads and results of finished futures, and the worker keeps
the texts of rollouts."""

PRUNE_HOURS = env_int("TINKERAPI_PRUNE_HOURS", 0, minimum=0, maximum=24 * 365)
"""How often ``up`` runs ``prunefutures``; 0: never, which leaves it to the operator."""

ROLLOUTS_PER_RUN = env_int("TINKERAPI_ROLLOUTS_PER_RUN", 20_000, minimum=0, maximum=10_000_000)
"""Sampled sequences of a run that are kept as text for the console, the newest; 0: none."""

DATA_UPLOAD_MAX_MEMORY_SIZE = MAX_BODY_BYTES

# --- The admin's look, logging ----------------------------------------------------------

LOGIN_REDIRECT_URL = "admin:index"  # who typed the login page's address comes from no other page

UNFOLD = {
    "SITE_TITLE": "tinkerapi",
    "SITE_HEADER": "tinkerapi",
    "SITE_SUBHEADER": "LoRA training console",
    "SITE_SYMBOL": "model_training",
    "SITE_URL": "/docs/",
    "SHOW_VIEW_ON_SITE": False,
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": "tinkerapi.console.navigation.favicon"}
    ],
    "STYLES": ["tinkerapi.console.navigation.stylesheet"],
    "DASHBOARD_CALLBACK": "tinkerapi.console.dashboard.dashboard",
    "LOGIN": {"form": "tinkerapi.console.login_form.LoginForm"},
    "SIDEBAR": {"navigation": "tinkerapi.console.navigation.navigation"},
}

LOG_FORMAT = env_choice("TINKERAPI_LOG_FORMAT", "text", ("text", "json"))
"""Of the records in the log files: for people, or one JSON object in each line."""

LOGGING = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {
        "text": {"()": "tinkerapi.server.logs.LineFormatter"},
        "json": {"()": "tinkerapi.server.logs.JsonFormatter", "process": ROLE},
    },
    "filters": {"repeats": {"()": "tinkerapi.server.logs.RepeatFilter"}},
    "handlers": {
        "console": {
            "class": "logging.StreamHandler",
            "formatter": LOG_FORMAT,
            "filters": ["repeats"],
        }
    },
    "root": {"handlers": ["console"], "level": "INFO"},
    "loggers": {
        "django.request": {"level": "ERROR"},
        "django-q": {"level": "WARNING"},  # otherwise a line for every doorbell
        # Where credentials and addresses were found; errors are ours to report.
        "aiobotocore": {"level": "WARNING"},
        "botocore": {"level": "WARNING"},
    },
}

refuse_unknown_variables()
