"""Groups whose nodes leave and return: who takes part in an attempt, and where a returning node waits.

`membership.py` has the rules, `rollcall.py` is node 0's side of a meeting, `waiting_room.py` every other node's.
"""
