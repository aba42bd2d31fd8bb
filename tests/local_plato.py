#!/usr/bin/env python3
"""A Plato on this machine, to try and to test without an account: `python3 tests/local_plato.py run start -c`.

`up`, `env`, `status` and `down [--purge]` manage it. `run ARGS` and `exec -- CMD` start it when needed, and run
`plato_sandbox.py ARGS` or any command against it. It listens on 127.0.0.1 only; its data is in ~/.plato-local.
"""

from __future__ import annotations

import sys

from localplato.cli import main

if __name__ == "__main__":
    sys.exit(main())
