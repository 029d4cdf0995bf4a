"""World models: the contract (base) and the families that fulfil it.

This room knows no mesh, no configuration object and no data: plain values and arrays.
"""

# model.name -> the class; any other model is named as package.module:Name
FAMILIES = {
    "vjepa2": "wmjax.models.vjepa2:VJEPA2",
    "vjepa21": "wmjax.models.vjepa21:VJEPA21",
    "vjepa2_ac": "wmjax.models.vjepa2_ac:VJEPA2AC",
    "lewm": "wmjax.models.lewm:LeWM",
}
