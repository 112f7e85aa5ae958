"""The pages of the site."""

import os

from django.http import HttpResponse
from django.urls import path
from prometheus_client import Counter

orders = Counter("shop_orders", "Orders received")


def order(_request):
    orders.inc()
    return HttpResponse(f"An order for worker {os.getpid()}\n")


urlpatterns = [path("", order)]
