"""The command line, for ``python -m hubbeam.pipelines``."""

from hubbeam.pipelines.cli import main

main()
