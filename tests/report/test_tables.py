from hf_accel.report.tables import format_table


def test_columns_of_numbers_are_aligned_to_the_right():
    lines = format_table(["run", "units"], [["moco", "400,000"], ["a|b", "1,000"]]).splitlines()
    assert lines == [
        "| run  |   units |",
        "|:-----|--------:|",
        "| moco | 400,000 |",
        r"| a\|b |   1,000 |",
    ]
