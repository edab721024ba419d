"""schemathesis against a server of its own: no status 5xx, no answer that the OpenAPI document does not know, no hang.

    python -m benchmarks.clients.schemathesis_run [--minutes 12] [--seed 7]

It needs the `dev` extra. The tests run a short form of it (tests/server/test_schema.py). The server's sequences are
short, so that what schemathesis asks for is written soon.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.server.served import Served
from tests.server.test_schema import CHECKS, without_large


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    server = Served("--max-length", "200")
    try:
        document = server.ready().client.get("/openapi.json").json()
        with tempfile.TemporaryDirectory() as directory:
            schema = Path(directory) / "openapi.json"
            schema.write_text(json.dumps(without_large(document)))
            command = [sys.executable, "-m", "schemathesis.cli", "run", str(schema)]
            command += ["--url", str(server.client.base_url), "--phases", "examples,coverage,fuzzing,stateful"]
            command += ["--max-time", str(int(options.minutes * 60)), "--seed", str(options.seed), "--checks", CHECKS]
            command += ["--request-timeout", "30", "--continue-on-failure", "--generation-database", "none"]
            failed = subprocess.run(command, cwd=directory).returncode
        stats = server.client.get("/v1/statewise/stats").json()
        print(f"ready: {server.client.get('/ready').json()['ready']}, left running: {stats['running']}")
    finally:
        server.stop()
    sys.exit(failed)


if __name__ == "__main__":
    main()
