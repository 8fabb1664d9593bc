import sys

from mixfeat.cli import main

sys.exit(main())
