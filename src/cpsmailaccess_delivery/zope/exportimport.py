"""GenericSetup: a `mailhost.MailboxHost` as XML, without its password."""

from __future__ import annotations

from typing import Any, Final

from Products.GenericSetup.interfaces import ISetupEnviron
from Products.MailHost.exportimport import MailHostXMLAdapter
from zope.component import adapter

from .mailhost import IMailboxHost
from .mailhost_form import IMMEDIATE, may_keep_password
from .security import check_manages_site

_TEXTS: Final = ("smtp_host", "smtp_uid", "smtp_queue_directory", "delivery_name", "immediate")
_SWITCHES: Final = ("smtp_queue", "force_tls", "implicit_tls", "route_by_user")


@adapter(IMailboxHost, ISetupEnviron)
class MailboxHostXMLAdapter(MailHostXMLAdapter):
    """Attributes of the stock MailHost, and ours.  What is not there stays as it is."""

    def _exportNode(self) -> Any:
        node = super()._exportNode()
        node.removeAttribute("smtp_pwd")
        for name in ("force_tls", "implicit_tls", "route_by_user"):
            node.setAttribute(name, str(bool(getattr(self.context, name))))
        node.setAttribute("delivery_name", self.context.delivery_name)
        node.setAttribute("immediate", self.context.immediate)
        return node

    def _importNode(self, node: Any) -> None:
        host = self.context
        given = dict(node.attributes.items())
        if given.get("delivery_name", host.delivery_name) != host.delivery_name:
            check_manages_site(host)
        changes: dict[str, Any] = {name: given[name] for name in _TEXTS if name in given}
        changes |= {
            name: self._convertToBoolean(given[name]) for name in _SWITCHES if name in given
        }
        if "smtp_port" in given:
            changes["smtp_port"] = int(given["smtp_port"])
        if changes.get("immediate", host.immediate) not in IMMEDIATE:
            raise ValueError(f"immediate={given['immediate']!r}: is one of {', '.join(IMMEDIATE)}")
        relay = ("smtp_host", "smtp_port", "force_tls", "implicit_tls")
        if not may_keep_password(host, {n: changes.get(n, getattr(host, n)) for n in relay}):
            changes["smtp_pwd"] = ""
        for name, value in changes.items():
            setattr(host, name, value)
        if given.get("smtp_pwd"):
            self._logger.warning(
                "smtp_pwd is not imported: give a relay with a login to an account of the outbox"
            )
        self._logger.info("MailboxHost imported.")
