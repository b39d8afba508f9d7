import sys

from toolkit.models.pruning.command import main

sys.exit(main())
