#!/usr/bin/env python3
"""A Plato on this machine, to try and test without an account: `python3 tests/local_plato.py run start -c`.

`up`, `env`, `status` and `down [--purge]` manage it. `run ARGS` and `exec -- CMD` start it when needed, and
run `plato_sandbox.py ARGS` or any command against it. It listens on 127.0.0.1 only; its data directory is
`$PLATO_LOCAL_HOME`, or `--home DIR`, or ~/.plato-local.
"""

from __future__ import annotations

import sys


def main() -> int:
    if sys.platform == "win32":
        print("local plato: it needs Linux; on Windows run it in WSL", file=sys.stderr)
        return 1
    from localplato import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
