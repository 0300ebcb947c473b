"""Who asks, and may they: authenticators, authorizers, RBAC and its bootstrap policy, reviews, token requests.

Entry: `setup.build_auth`. Everything reads the API server's own stores in process; nothing here serves HTTP by itself.
"""
