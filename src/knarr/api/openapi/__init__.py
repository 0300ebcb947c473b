"""OpenAPI v2 and v3 documents made from the facts and from CRD schemas.

documents.py is what the API server holds; definitions.py makes schemas, paths.py operations, v2.py turns the v3 form
into Swagger 2.0, and gnostic.py writes that in the binary form that clients ask for.
"""

from knarr.api.openapi.documents import CustomAPI, OpenAPIDocuments

__all__ = ["CustomAPI", "OpenAPIDocuments"]
