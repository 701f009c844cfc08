"""Where models come from and where they lie: catalogue, download, the cache on disk."""

from millicent.hub.catalogue import CATALOGUE
from millicent.hub.files import Progress
from millicent.hub.store import InstalledModel, installed_at_ns, list_installed, pull, resolve, verify

__all__ = [
    "CATALOGUE",
    "InstalledModel",
    "Progress",
    "installed_at_ns",
    "list_installed",
    "pull",
    "resolve",
    "verify",
]
