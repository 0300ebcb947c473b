"""One module per verb: what happens between authorization and the answer.

read.py    get, list, watch: plain functions, answered from memory in the turn the request arrived
create.py  create (and create on a subresource)
update.py  the loop of update, patch and apply: read, change, admit, prepare, validate, compare and swap
patch.py   how each patch type makes the new object
delete.py  delete and deletecollection
"""
