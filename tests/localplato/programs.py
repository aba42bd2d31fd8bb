"""What a VM sees differently of the host's programs: the Compose plugin of the server's user, or no Docker.

The host's directories are read-only in a VM. Over one that is to look different lies an overlay of a layer
that adds or hides names.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .machine import PATH, Machine

PLUGIN = "docker-compose"
PLUGIN_DIRECTORIES = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)
PLUGIN_LAYER = "/usr/local/lib"


def compose_plugin() -> Path | None:
    """The Compose plugin of the server's user; None without one, or where every user has one already."""
    if any(os.path.exists(f"{directory}/{PLUGIN}") for directory in PLUGIN_DIRECTORIES):
        return None
    path = Path(os.path.expanduser(os.environ.get("DOCKER_CONFIG") or "~/.docker"), "cli-plugins", PLUGIN)
    return path if os.access(path, os.X_OK) else None


def plug_in_compose(machine: Machine) -> None:
    """Before the VM's start: let every user of it have the Compose plugin."""
    plugin = compose_plugin()
    if plugin is None or not os.path.isdir(PLUGIN_LAYER):
        return
    shown = f"/run/plato/{PLUGIN}"
    place = machine.directory / "run" / "plato"
    place.mkdir(mode=0o755, exist_ok=True)
    (place / PLUGIN).touch()
    machine.shown[shown] = str(plugin)
    layer = new_layer(machine, PLUGIN_LAYER)
    (layer / "docker" / "cli-plugins").mkdir(parents=True)
    (layer / "docker" / "cli-plugins" / PLUGIN).symlink_to(shown)


def hide(machine: Machine, name: str) -> None:
    """Before the VM's start: take a program away, as if it had never been installed."""
    for directory in dict.fromkeys(os.path.realpath(path) for path in PATH.split(":")):
        if os.path.lexists(f"{directory}/{name}"):
            os.mknod(new_layer(machine, directory) / name, stat.S_IFCHR)


def new_layer(machine: Machine, directory: str) -> Path:
    """The layer that is to lie over a directory of the host."""
    layer = machine.directory / "layers" / directory.strip("/").replace("/", "-")
    layer.mkdir(parents=True, exist_ok=True)
    machine.overlays[directory] = str(layer)
    return layer
