"""Names of certificate signers: "domain.example/name".

Source: pkg/apis/certificates/validation ValidateSignerName, core/validation ValidateSignerName.
"""

from __future__ import annotations

from knarr.api.errors import invalid_value, required, too_long
from knarr.api.validation.metadata import Errors, add
from knarr.api.validation.strings import dns_subdomain

MAXIMUM_NAME = 253 + 1 + 63


def validate_signer_name(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
        return
    segments = name.split("/")
    if len(segments) != 2:
        errors.append(invalid_value(path, name, "must be a fully qualified domain and path of the form 'example.com/signer-name'"))
        return
    domain, signer = segments
    domain_found = dns_subdomain(domain)
    add(errors, path, name if not domain else domain, domain_found)
    if domain and len(domain.split(".")) < 2:
        errors.append(invalid_value(path, domain, "should be a domain with at least two segments separated by dots"))
    for part in signer.split("."):
        add(errors, path, signer, dns_subdomain(part))
    if len(name) > MAXIMUM_NAME:
        errors.append(too_long(path, MAXIMUM_NAME))
