"""Why something does not come about: a claim, a namespace's end, a rollout, a request that is refused.

Role: the library behind `knarr why KIND/NAME` and `knarr why can-i`; `knarr.network.why` is the one for packets and Services,
`knarr.scheduler.why` the one for nodes and pods. Each module asks the API what the components have decided (conditions, events,
the authorizer's answer) and judges further only with the components' own functions.
Invariants: nothing is changed. A `Step` with ok False names what stops it; without one nothing does.
"""
