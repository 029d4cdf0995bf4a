"""The LeRobot dataset format, v2.0 to v3.0: reading clips, states and actions."""

from wmjax.data.lerobot.native import LeRobotSource

__all__ = ["LeRobotSource"]
