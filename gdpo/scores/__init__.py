"""What a picture is worth: rewards of training and metrics of evaluation."""
