"""The modes of wmjax.main besides training: demo, eval and plan. No other room imports this one."""
