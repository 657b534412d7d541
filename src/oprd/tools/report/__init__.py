"""`oprd report`: one offline HTML page about one or several run folders.

May be imported by cli only.
Start reading at `page.py`; `before_after.py` measures distances between student and teacher.
"""
