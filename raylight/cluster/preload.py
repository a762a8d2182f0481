"""What each process of a local Ray imports as soon as it runs, while Ray finds out that it is to be a worker."""

import importlib

from .quick_imports import quick_imports
from .timeline import WORKER

WORKER.mark("Ray imported")
with quick_imports():
    importlib.import_module("raylight.cluster.actor")
WORKER.mark("actor imported")
