"""What stands behind run.py: provides a ComfyUI, starts its server, runs the demo and the tests.

Everything here but the demo itself runs on the standard library alone, in whatever Python the reader started.
"""
