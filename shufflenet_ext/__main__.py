import sys

from shufflenet_ext.cli import main

sys.exit(main())
