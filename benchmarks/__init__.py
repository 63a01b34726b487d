"""This project, zope.sendmail and Postfix side by side: ``make bench``, docs/performance.rst."""
