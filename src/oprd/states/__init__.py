"""Hidden states: which layers and positions to read, model batches, capture, similarity, and the teacher's states.

May be imported by alignment and every later package.
Start reading at `capture.py`.
"""
