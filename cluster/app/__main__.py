"""`python -m cluster.app`: the command `vdg` where only our packages travel, as in a Ray job."""

from cluster.app.cli import program

program()
