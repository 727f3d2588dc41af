"""
What a curious server can recover of a text from what crosses the wire, measured on the owner's own text and machine.

Needs torch and a model folder. No device that trains imports this.
"""
