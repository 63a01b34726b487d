"""GenericSetup: a `mailhost.MailboxHost` as XML, without its password."""

from __future__ import annotations

from typing import Any

from Products.GenericSetup.interfaces import ISetupEnviron
from Products.MailHost.exportimport import MailHostXMLAdapter
from zope.component import adapter

from .mailhost import IMailboxHost
from .mailhost_form import IMMEDIATE
from .security import check_manages_site


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
        relay = host.smtp_host, int(host.smtp_port)
        was_encrypted = host.force_tls or host.implicit_tls
        for name in ("smtp_host", "smtp_uid", "smtp_queue_directory", "delivery_name"):
            if name in given:
                setattr(host, name, given[name])
        if "smtp_port" in given:
            host.smtp_port = int(given["smtp_port"])
        for name in ("smtp_queue", "force_tls", "implicit_tls", "route_by_user"):
            if name in given:
                setattr(host, name, self._convertToBoolean(given[name]))
        if "immediate" in given:
            if given["immediate"] not in IMMEDIATE:
                raise ValueError(
                    f"immediate={given['immediate']!r}: is one of {', '.join(IMMEDIATE)}"
                )
            host.immediate = given["immediate"]
        gives_up_tls = was_encrypted and not (host.force_tls or host.implicit_tls)
        if (host.smtp_host, host.smtp_port) != relay or gives_up_tls:
            host.smtp_pwd = ""  # it was for another relay, or not to be read on the way
        if given.get("smtp_pwd"):
            self._logger.warning(
                "smtp_pwd is not imported: give a relay with a login to an account of the outbox"
            )
        self._logger.info("MailboxHost imported.")
