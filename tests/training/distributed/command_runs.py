"""A script of several commands after each other in the same processes, as JSON in RUNS: importing takes longer."""

import json
import os

from pera_lightning.cli.main import main

for words in json.loads(os.environ["RUNS"]):
    main(words)
