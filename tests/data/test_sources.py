from evopress.data.sources import text_digest


def test_digest_sees_where_documents_end():
    assert len({text_digest(texts) for texts in (["ab", "c"], ["a", "bc"], ["abc"], ["ab", "c", ""])}) == 4
