from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="cpsmailaccess_delivery",
    version="1.0.0.dev0",
    description="An outbox for applications whose mail leaves through many SMTP accounts",
    long_description="\n\n".join(
        (HERE / name).read_text(encoding="utf-8") for name in ("README.rst", "CHANGES.rst")
    ),
    long_description_content_type="text/x-rst",
    license="ZPL-2.1",
    license_files=["LICENSE.txt"],
    keywords="mail smtp queue outbox transaction maildir zope plone",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Framework :: Zope",
        "Intended Audience :: Developers",
        "Intended Audience :: System Administrators",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Communications :: Email :: Mail Transport Agents",
        "Typing :: Typed",
    ],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages("src"),
    # Not by MANIFEST.in: for what that finds, setuptools takes the templates for a package, and
    # warns at length.
    package_data={"": ["*.zcml", "py.typed", "templates/*.zpt"]},
    zip_safe=False,
    install_requires=[
        "click >= 8.1",
        "cryptography >= 42",
        "idna >= 3.4",
        "inotify-simple >= 2.0; sys_platform == 'linux'",
        "rich >= 13",
        "transaction >= 4",
        "zope.component >= 5",
        "zope.configuration >= 5",
        "zope.event >= 5",
        "zope.interface >= 6",
        "zope.schema >= 7",
        "zope.security >= 6",
        "zope.sendmail >= 6",
    ],
    extras_require={
        # What `make bench` needs besides Debian's packages postfix and postgresql-15.
        "bench": [
            "matplotlib >= 3.8",
            "pgqueuer >= 1.6, < 2",
            "psycopg[binary] >= 3.2",
            "trustme >= 1.1",
        ],
        # What `make run` and applications' own tests need: certificates made on the spot; and
        # the Zope that `make run` starts.
        "demo": [
            "Products.MailHost >= 6",
            "trustme >= 1.1",
            "Zope[wsgi] >= 6.2",
            "zope.processlifetime >= 3",
        ],
        # What `make fuzz` needs besides `test`: it guides its inputs by coverage.  Apache 2.0;
        # wheels for this platform only, so that no test needs it.
        "fuzz": ["atheris >= 3.0; sys_platform == 'linux' and platform_machine == 'x86_64'"],
        # What `cpsmail run --metrics-port` needs.
        "metrics": ["prometheus_client >= 0.20"],
        # What Outbox("postgresql://...") needs; below 1.6, pgqueuer hands out stale jobs twice.
        "postgres": ["pgqueuer >= 1.6, < 2", "psycopg[binary] >= 3.2"],
        "test": [
            "hypothesis >= 6.100",
            "mypy >= 1.11",
            "playwright >= 1.45",
            "pgqueuer >= 1.6, < 2",
            # How settings of a MailHost are exported; Plone has it anyway.
            "Products.GenericSetup >= 5",
            "Products.MailHost >= 6",
            "prometheus_client >= 0.20",
            "psycopg[binary] >= 3.2",
            "pytest >= 8",
            "pytest-xdist >= 3.6",
            # examples/compose.yaml is read by a test.
            "PyYAML >= 6",
            "RelStorage[sqlite3] >= 4",
            "ruff >= 0.6",
            "SQLAlchemy >= 2",
            "trustme >= 1.1",
            "ZEO >= 6",
            "ZODB >= 5.8",
            "Zope[wsgi] >= 6.2",
            "zope.processlifetime >= 3",
            "zope.sqlalchemy >= 3",
            "zope.testbrowser >= 7",
            "zope.testing >= 5",
        ],
        # What `witness.zodb` asks after a crash.  (`witness.sql` needs a DB-API driver alone.)
        "zodb": ["ZODB >= 5.8"],
        # What start="IProcessStarting" needs, and who tells it.
        "zope": ["Products.MailHost >= 6", "Zope[wsgi] >= 6.2", "zope.processlifetime >= 3"],
    },
    entry_points={
        "console_scripts": ["cpsmail = cpsmailaccess_delivery.cli:main"],
        # What keeps an outbox that is named by a URL, by its scheme.
        "cpsmailaccess_delivery.backends": [
            "postgresql = cpsmailaccess_delivery.pg.backend:open_parts",
            "postgres = cpsmailaccess_delivery.pg.backend:open_parts",
        ],
    },
)
