"""The two commands of this repository.

They need nothing but Python 3.10 or newer and pip:

    python run.py demo     a real ComfyUI trains, saves, loads, mixes and samples SODA adapters
    python run.py test     every test, against that same ComfyUI and a real browser
"""

import sys

if sys.version_info < (3, 10):  # this file alone must stay readable for any older Python
    sys.exit("SODA needs Python 3.10 or newer; this is %d.%d: start run.py with a newer one." % sys.version_info[:2])

from runner.main import main

sys.exit(main(sys.argv[1:]))
