"""`python -m peft_pretraining COMMAND ...` is the command `qgalore`."""

import sys

from peft_pretraining.commands import main

sys.exit(main())
