"""What each process of a run does, from joining the process group to exporting the model. Does not belong here:
decisions (`resolve` makes them and puts them into the RunSpec), starting processes (`launcher`).
"""
