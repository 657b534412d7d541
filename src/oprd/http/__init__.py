"""HTTP to another process: a bounded client, pauses between attempts, requests that a signal can end.

May be imported by states, rollouts and every later package.
Start reading at `client.py`.
"""
