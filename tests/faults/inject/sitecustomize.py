"""Python imports this by itself when its folder is on PYTHONPATH: so a night and the Ray workers that it starts are
disturbed from outside, without a word in the product. Does nothing unless DAYBREAK_FAULTS names a folder.
"""

import os

if os.environ.get("DAYBREAK_FAULTS"):
    import rig

    rig.arm()
