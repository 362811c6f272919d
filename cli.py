"""The command line: `python cli.py fit --config configs/quickstart.yaml`; see `python cli.py --help`."""

from pera_lightning.cli.main import main

if __name__ == "__main__":
    main()
