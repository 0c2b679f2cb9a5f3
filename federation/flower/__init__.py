"""The only package that touches Flower's private API (flwr 1.41.0): everything else asks it.

- bundle.py     the app bundle (FAB): a shell that names this version and carries no code that is ever run
- clients.py    HTTP clients of the Runtime, Control and Fleet APIs, with a retry that never ends the process
- transfer.py   messages with a JSON body and one weights file, moved chunk by chunk from disk to disk
- runner.py     the resident runner that takes one task after the other without a new process
- superlink.py  Flower's SuperLink behind two listeners
- state.py, objects.py, lean.py, impatient.py  the SuperLink's state, objects, middlewares and HTTP, with less to do
- intake.py     the one path beside Flower's that hospitals reach
- supernode.py  Flower's SuperNode with a shorter poll and a restart that is let in

Rules:

- Telemetry, update checks and installs at run time are off, in every process, before Flower is imported.
- No installed file is changed. Where Flower hard-codes a value, it is set on the module that reads it, here.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION", "1")
