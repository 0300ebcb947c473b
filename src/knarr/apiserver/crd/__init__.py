"""Custom resources: CustomResourceDefinitions become endpoints while the server runs.

controller.py  reacts to every change of a CRD: names, conditions, endpoints, discovery, OpenAPI, clean-up
naming.py      which names are accepted, and the conditions (pure)
serving.py     from a CRD to endpoints: Resource, strategy, forms, table, converters
schema.py      the compiled functions of one version's schema, as verbs/ and machinery.py use them
webhook.py     conversion between versions by webhook
"""
