"""What each process of a run does, from joining the others to the exported model.

Does not belong here: decisions (`resolve` made them; they are in the RunSpec), starting processes (`launcher`).
"""
