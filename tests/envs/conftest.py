import os

# the oracle only steps: dm_control must not look for a display
os.environ["MUJOCO_GL"] = "disable"
