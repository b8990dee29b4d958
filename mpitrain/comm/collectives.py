"""The collectives on arrays: what each checks, prepares and returns; how it is performed is the engine's."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpitrain._errors import InputError
from mpitrain._options import brief
from mpitrain.comm import checks, direct, objects, prepare
from mpitrain.comm import reproducible as fixed
from mpitrain.comm.calls import Call, Prepared
from mpitrain.comm.engine import Engine
from mpitrain.comm.prepare import Counts
from mpitrain.comm.request import Request


class Collectives(Engine):
    """Reductions and exchanges that all ranks take part in; see `mpitrain.Communicator` for what they share."""

    def allreduce(
        self,
        x: Any,
        op: str = "sum",
        out: Any = None,
        algorithm: str | None = None,
        reproducible: bool = False,
        bucket_bytes: int | None = None,
    ) -> Any:
        """Reduce over all ranks, for all.  Collective.

        Parameters
        ----------
        x : array, or tree of arrays
            The same shapes and dtypes on all ranks.
        op : {"sum", "mean", "min", "max", "prod", "and", "or"}
            ``and`` and ``or`` are bitwise on integers.  ``min`` and ``max`` of NaN are undefined.
        out : like ``x``, optional
            Where the result goes; ``out=x`` reduces in place.
        algorithm : str, optional
            How it is performed: ``"ring"``, ``"recursive"``, ``"doubling"``, ``"tree"``, ``"ordered"``,
            ``"pipelined"``, ``"hierarchical"`` or ``"default"``.
        reproducible : bool
            Sum, or take the mean, in fixed point: the same bits for every order of the ranks, algorithm and backend,
            off by at most p·2^−53 times the largest magnitude of each array in x before it is rounded once (below
            1024 ranks; see `mpitrain.arrays.FixedPoint`).  Moves 4 bytes per array in a maximum, and 8 per element.
        bucket_bytes : int, optional
            The arrays of a tree travel in messages of at most so many bytes, each of as many successive arrays of one
            dtype as fit in; a larger array makes one by itself.  The same on all ranks.  None: one message per dtype.
            Reproducible sums are cut within arrays too, so that a tiny one makes many messages.

        Returns
        -------
        like ``x``
            The same on all ranks.

        Raises
        ------
        InputError, DtypeError
            Arguments that cannot be used; nothing was communicated.
        NonFiniteError
            ``reproducible`` only: x holds an infinity or NaN on some rank, or a sum is beyond the dtype's range.
        CommunicationError
            The exchange failed.
        """
        if reproducible:
            return fixed.allreduce(self, x, op, out, algorithm, bucket_bytes)
        if algorithm is None and bucket_bytes is None:
            entry = self._entry
            result = None if entry is None else entry.allreduce(x, op, out)
            if result is None:
                result = direct.allreduce(self, x, op, out)
            if result is not None:
                return result
        return self._complete(self._allreduce("allreduce", x, op, out, bucket_bytes), algorithm)

    def iallreduce(self, x: Any, op: str = "sum", out: Any = None, bucket_bytes: int | None = None) -> Request:
        """Begin an `allreduce`."""
        return self._start(self._allreduce("iallreduce", x, op, out, bucket_bytes))

    def _allreduce(self, operation: str, x: Any, op: str, out: Any, bucket_bytes: int | None) -> Prepared:
        return prepare.reduction(operation, self.size, x, op, out, None, True, bucket_bytes)

    def reduce(
        self,
        x: Any,
        op: str = "sum",
        root: int = 0,
        out: Any = None,
        algorithm: str | None = None,
        reproducible: bool = False,
        bucket_bytes: int | None = None,
    ) -> Any:
        """Reduce over all ranks, for the root; the others get None.  Collective; arguments as for `allreduce`.

        Algorithms: ``ring``, ``tree``, ``ordered``.
        """
        if reproducible:
            return fixed.reduce(self, x, op, root, out, algorithm, bucket_bytes)
        if algorithm is None and bucket_bytes is None:
            result = direct.reduce(self, x, op, root, out)
            if result is not None:
                return result if self.rank == root else None
        return self._complete(self._reduce("reduce", x, op, root, out, bucket_bytes), algorithm)

    def ireduce(
        self, x: Any, op: str = "sum", root: int = 0, out: Any = None, bucket_bytes: int | None = None
    ) -> Request:
        """Begin a `reduce`."""
        return self._start(self._reduce("ireduce", x, op, root, out, bucket_bytes))

    def _reduce(self, operation: str, x: Any, op: str, root: int, out: Any, bucket_bytes: int | None) -> Prepared:
        root = checks.rank(operation, "root", root, self.size)
        return prepare.reduction(operation, self.size, x, op, out, root, self.rank == root, bucket_bytes)

    def broadcast(
        self,
        x: Any,
        root: int = 0,
        out: Any = None,
        algorithm: str | None = None,
        bucket_bytes: int | None = None,
    ) -> Any:
        """Give the root's values to all.  Collective.

        Parameters
        ----------
        x : array, or tree of arrays
            On the root, the values; elsewhere anything of the same shapes and dtypes, whose values are not read.
        root : int
            The rank that has the values.
        out : like ``x``, optional
            Where the result goes; ``out=x`` overwrites.
        algorithm : {"ring", "tree", "default"}, optional
            How it is performed.
        bucket_bytes : int, optional
            As for `allreduce`.
        """
        if algorithm is None and bucket_bytes is None:
            entry = self._entry
            result = None if entry is None else entry.broadcast(x, root, out)
            if result is None:
                result = direct.broadcast(self, x, root, out)
            if result is not None:
                return result
        return self._complete(self._broadcast("broadcast", x, root, out, bucket_bytes), algorithm)

    def ibroadcast(self, x: Any, root: int = 0, out: Any = None, bucket_bytes: int | None = None) -> Request:
        """Begin a `broadcast`."""
        return self._start(self._broadcast("ibroadcast", x, root, out, bucket_bytes))

    def _broadcast(self, operation: str, x: Any, root: int, out: Any, bucket_bytes: int | None) -> Prepared:
        root = checks.rank(operation, "root", root, self.size)
        return prepare.broadcast(operation, x, root, out, self.rank == root, bucket_bytes)

    def reduce_scatter(
        self,
        x: Any,
        op: str = "sum",
        counts: Counts = None,
        out: Any = None,
        algorithm: str | None = None,
        reproducible: bool = False,
    ) -> Any:
        """Reduce over all ranks, and give each its share of the rows.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            The same shape and dtype on all ranks.
        op : str
            As for `allreduce`.
        counts : sequence of int, optional
            Rows that each rank gets, the same on all ranks; zeros are allowed.
        out : array, optional
            Where the result goes.
        algorithm : {"ring", "recursive", "ordered", "default"}, optional
            How it is performed.
        reproducible : bool
            As for `allreduce`.

        Returns
        -------
        array, shape (…), or (counts[rank], …) with ``counts``
        """
        if reproducible:
            return fixed.reduce_scatter(self, x, op, counts, out, algorithm)
        if counts is None and algorithm is None:
            entry = self._entry
            result = None if entry is None else entry.reduce_scatter(x, op, out)
            if result is None:
                result = direct.reduce_scatter(self, x, op, out)
            if result is not None:
                return result
        return self._complete(self._reduce_scatter("reduce_scatter", x, op, counts, out), algorithm)

    def ireduce_scatter(self, x: Any, op: str = "sum", counts: Counts = None, out: Any = None) -> Request:
        """Begin a `reduce_scatter`."""
        return self._start(self._reduce_scatter("ireduce_scatter", x, op, counts, out))

    def _reduce_scatter(self, operation: str, x: Any, op: str, counts: Counts, out: Any) -> Prepared:
        return prepare.reduce_scatter(operation, self.rank, self.size, x, op, counts, out)

    def allgather(self, x: Any, counts: Counts = None, out: Any = None, algorithm: str | None = None) -> Any:
        """Collect every rank's array, for all.  Collective.

        Parameters
        ----------
        x : array, shape (…), or (counts[rank], …) with ``counts``
            The same shape on all ranks but for the number of rows.
        counts : sequence of int, optional
            Rows that each rank gives, the same on all ranks; zeros are allowed.
        out : array, optional
            Where the result goes.
        algorithm : {"ring", "recursive", "default"}, optional
            How it is performed.

        Returns
        -------
        array, shape (size, …), or (sum(counts), …) with ``counts``
            The same on all ranks.
        """
        if counts is None and algorithm is None:
            entry = self._entry
            result = None if entry is None else entry.allgather(x, out)
            if result is None:
                result = direct.allgather(self, x, out)
            if result is not None:
                return result
        return self._complete(self._gather("allgather", x, None, counts, out), algorithm)

    def iallgather(self, x: Any, counts: Counts = None, out: Any = None) -> Request:
        """Begin an `allgather`."""
        return self._start(self._gather("iallgather", x, None, counts, out))

    def gather(self, x: Any, root: int = 0, counts: Counts = None, out: Any = None) -> Any:
        """Collect every rank's array, for the root; the others get None.  Collective; as `allgather`."""
        root = checks.rank("gather", "root", root, self.size)
        return self._complete(self._gather("gather", x, root, counts, out))

    def _gather(self, operation: str, x: Any, root: int | None, counts: Counts, out: Any) -> Prepared:
        return prepare.gathering(operation, self.rank, self.size, x, counts, out, root)

    def scatter(self, x: Any, root: int = 0, counts: Counts = None, out: Any = None) -> Any:
        """Give each rank its share of the root's rows.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            Read on the root only; None will do elsewhere, for a short header goes ahead and tells dtype and shape.
        root : int
            The rank that has the values.
        counts : sequence of int, optional
            Rows that each rank gets; zeros are allowed.  Read on the root only.
        out : array, optional
            Where the result goes.

        Returns
        -------
        array, shape (…), or (counts[rank], …) with ``counts``
            Off the root, in the library of ``out``, else of ``x`` where it has the root's structure, else a NumPy
            array.
        """
        root = checks.rank("scatter", "root", root, self.size)
        sends = self.rank == root
        header = prepare.scatter_header("scatter", self.size, x, counts) if sends else None
        like, shares = objects.broadcast(self, header, root)
        whole = x if sends else prepare.placeholders(like, x if out is None else out)
        return self._complete(prepare.scatter("scatter", self.rank, self.size, whole, root, shares, out))

    def alltoall(self, x: Any, counts: Counts = None, recv_counts: Counts = None, out: Any = None) -> Any:
        """Give row i to rank i, and get one row from each.  Collective.

        Parameters
        ----------
        x : array, shape (size, …), or (sum(counts), …) with ``counts``
            The same dtype and row shape on all ranks.
        counts : sequence of int, optional
            Rows for each rank; zeros are allowed.  With or without them on all ranks alike.
        recv_counts : sequence of int, optional
            Rows that come from each rank, where all ranks know them; else they are exchanged first.  With ``counts``
            only.
        out : array, optional
            Where the result goes.

        Returns
        -------
        array, shape (size, …), or (sum(recv_counts), …) with ``counts``
            In the order of the ranks that they come from.
        """
        if counts is None and recv_counts is not None:
            raise InputError(
                "recv_counts without counts", operation="alltoall", got=f"recv_counts={brief(recv_counts)}",
                remedy="give counts too, or neither",
            )  # fmt: skip
        shares = None if counts is None else checks.counts("alltoall", counts, self.size)
        if shares is not None and recv_counts is None:
            exchange = prepare.alltoall("alltoall", self.size, np.array(shares, np.int64), None, None, None)
            recv_counts = self._complete(exchange).tolist()
        return self._complete(self._alltoall("alltoall", x, shares, recv_counts, out))

    def ialltoall(self, x: Any, counts: Counts = None, recv_counts: Counts = None, out: Any = None) -> Request:
        """Begin an `alltoall`; ``counts`` need ``recv_counts``."""
        if (counts is None) != (recv_counts is None):
            raise InputError("give counts and recv_counts, or neither", operation="ialltoall")
        return self._start(self._alltoall("ialltoall", x, counts, recv_counts, out))

    def _alltoall(self, operation: str, x: Any, counts: Counts, recv_counts: Counts, out: Any) -> Prepared:
        shares = None if counts is None else checks.counts(operation, counts, self.size)
        recv_shares = None if recv_counts is None else checks.counts(operation, recv_counts, self.size)
        return prepare.alltoall(operation, self.size, x, shares, recv_shares, out)

    def barrier(self) -> None:
        """Return once every rank has called this.  Collective."""
        self._complete(Prepared("barrier", [Call("barrier")], lambda: None))

    def ibarrier(self) -> Request:
        """Begin a `barrier`: complete once every rank has begun it."""
        return self._start(Prepared("ibarrier", [Call("barrier")], lambda: None))
