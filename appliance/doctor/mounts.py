"""Whether the folders are as they should be: configuration readable, data readable but not writable, state writable.

Nothing is written into the data: whether it could be is asked of the kernel. One file is written into the state, and
taken away; where there is no state yet, a folder is made where it would lie, and taken away.
"""

from __future__ import annotations

import errno
import os
import tempfile
import time
from pathlib import Path

from appliance.doctor.context import Context
from appliance.doctor.finding import Finding, Private, fail, ok, warn
from federation.errors import Code

TRIAL = 2**20


def check(context: Context) -> list[Finding]:
    """Configuration, data, state."""
    findings = [_data(context.settings.data), _state(context.settings.state)]
    if context.config is not None:
        findings.insert(0, _configuration(context.config))
    return findings


def _configuration(path: Path) -> Finding:
    private = {"config": Private("site.toml", str(path))}
    if not path.is_file():
        return ok("there is no site.toml: the settings come from the environment")
    if not os.access(path, os.R_OK):
        return fail(
            Code.MOUNT_UNREADABLE, "[config] cannot be read", "Let the appliance's user read it.", private=private
        )
    if path.stat().st_mode & 0o002:
        return warn("everybody may write [config]", "chmod 644 [config]", private=private)
    return ok("[config] can be read", private=private)


def _data(path: Path) -> Finding:
    private = {"data": Private("the data folder", str(path))}
    if not path.is_dir():
        return fail(
            Code.DATASET_JSON_MISSING,
            "[data] is not there, or is not a folder",
            "Mount the dataset there (`-v /where/it/lies:/data:ro`), or correct `data` in site.toml.",
            private=private,
        )
    if not os.access(path, os.R_OK | os.X_OK):
        return fail(
            Code.MOUNT_UNREADABLE,
            "[data] cannot be read by the appliance's user",
            "Give this user (or its group) leave to read the folder and all in it.",
            private=private,
        )
    if os.access(path, os.W_OK):
        return warn(
            "[data] could be written; the appliance never does",
            "Mount it read-only (`:ro`), so that nothing can.",
            Code.DATA_WRITABLE,
            private=private,
        )
    return ok("[data] can be read and not written", private=private)


def _state(path: Path) -> Finding:
    private = {"state": Private("the state folder", str(path))}
    if not path.is_dir():
        try:
            _make_beside(path)
        except OSError as error:
            private["error"] = Private(type(error).__name__, str(error))
            advice = "Make it, and let the appliance's user own it; or correct `state` in site.toml."
            return fail(Code.DISK_FULL, "[state] is not there and cannot be made ([error])", advice, private=private)
        return ok("[state] is not there yet and can be made", private=private)
    started = time.perf_counter()
    try:
        with tempfile.NamedTemporaryFile(dir=path, prefix=".doctor-") as stream:
            stream.write(bytes(TRIAL))
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        private["error"] = Private(type(error).__name__, str(error))
        return fail(
            Code.DISK_FULL,
            "[state] cannot be written ([error])",
            "Let the appliance's user own it (chown), mount it without :ro, or free space.",
            private=private,
        )
    milliseconds = round(1000 * (time.perf_counter() - started), 1)
    found = f"[state] can be written (1 MiB, to the disk, in {milliseconds:g} ms)"
    if milliseconds > 2000:
        return warn(found, "The disk is slow: training waits for it. Use a local disk.", private=private)
    return ok(found, private=private, measured={"fsync_ms": milliseconds})


def _make_beside(path: Path) -> None:
    """Make a folder in the nearest place above that is there, and take it away; raises OSError.

    Tried and not only asked: root may write into /proc, says the kernel, and still can make nothing there.
    """
    above = (path.absolute(), *path.absolute().parents)
    place = next(folder for folder in above if os.path.lexists(folder))
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-"):
        pass
