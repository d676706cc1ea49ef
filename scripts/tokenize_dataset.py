#!/usr/bin/env python
"""`qgalore tokenize`: write the token ids of a data set to files."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout that is not installed

from peft_pretraining.commands.tokenize import main

if __name__ == "__main__":
    sys.exit(main())
