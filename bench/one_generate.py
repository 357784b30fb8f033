"""The `quire` command as a module, for benches that start it as a process."""

import sys

from quire.serving.cli import main

sys.exit(main())
