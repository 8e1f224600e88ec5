"""midge: from unlabelled images to a small network proven on the device.

The four stages live in :mod:`midge.train`, :mod:`midge.export`, :mod:`midge.runtime` and :mod:`midge.profiles`; they
meet only in folders on disk. ``python -m midge --help`` lists the commands.
"""

__version__ = "0.1.0"
